"""How good a policy is, beside the controls that it has to beat at the same measured cost."""
