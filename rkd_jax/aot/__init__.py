"""What a step would need of a TPU slice, from shapes alone.

``rkd compile`` is the command. The compiler is the true one, in the package libtpu
(``pip install 'rkd_jax[aot]'``); no TPU is needed, and nothing is run.
"""
