"""The one subclass of ``transformers.Trainer``, its settings, checkpoints, signals, metrics and reports."""
