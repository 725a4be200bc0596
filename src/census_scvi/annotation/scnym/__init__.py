"""scNym's method: a classifier trained with MixMatch on labelled and unlabelled cells, and a domain adversary."""
