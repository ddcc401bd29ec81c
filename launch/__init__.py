"""What runs on the accelerators: `accelerate launch -m launch` trains one job file or one run contract.

Importing this package imports neither torch nor transformers; only the training modules do.
"""

__version__ = "0.1.0"
