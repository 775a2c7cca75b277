"""The autograd Functions, one file per op; each opens with the derivation of its gradient."""
