"""What a step would need of TPUs or GPUs that are not here, from shapes alone.

``rkd compile`` is the command. The compilers are the true ones: of TPUs in the package
libtpu (``pip install 'rkd_jax[aot]'``), of GPUs in JAX's own plugin (``pip install
'jax[cuda12]'``, of the version of jax). No device is needed, and nothing is run.
"""
