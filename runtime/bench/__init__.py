"""`optc bench`: the speed of an artifact, by the field's figures."""
