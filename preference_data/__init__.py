"""Reading training data. This package never imports ``align``: what needs a model is handed to it."""
