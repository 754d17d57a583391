"""Uniformly scaling flows: normalizing flows with a constant Jacobian determinant, for anomaly detection.

The rooms are imported by name, so that this import stays light::

    from usf.flows import USFlow
    from usf.study import profile
"""

__version__ = "0.1.0"
"""The version of the package, the one in ``pyproject.toml``."""
