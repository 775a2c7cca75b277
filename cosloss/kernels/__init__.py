"""How an op is computed: a folder per backend, and `dispatch`, which chooses between them."""
