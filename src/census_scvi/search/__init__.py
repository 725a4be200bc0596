"""Search of settings: trials on one prepared file, their scores, and the choice of the winner."""
