"""Reading and writing training data: prompts, captioned images, preferences and the pairs made of them.

This package never imports ``align``: what needs a model is handed to it. Importing it loads nothing; its parts are
``readers`` (from files, folders, tars and hub data sets to ``schemas``), ``pairs``, ``writer``, ``inspect`` and ``prompts``.
"""
