"""What an experiment needs: profiles, training, records, statistics, tables."""
