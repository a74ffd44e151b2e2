"""The machinery behind the scripts, in rooms: common <- reading <- inference <- training.

    from shufflenet import Classifier

A room imports of the files in front only model.py, and of the rooms those before it.
"""

from shufflenet.inference.classifier import Classifier

__all__ = ["Classifier"]
