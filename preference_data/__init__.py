"""Reading and writing training data: prompts, captioned images, preferences, and the pairs made from them.

The package never imports ``align``: whatever needs a model is passed in. Importing it loads nothing. Its main modules
are ``readers`` (files, folders, tars and hub data sets become objects of ``schemas``), ``pairs``, ``writer``,
``inspect`` and ``prompts``.
"""
