"""What an experiment needs: seeded data, profiles, searches, feature caches, records, statistics, tables."""
