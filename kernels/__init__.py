"""Layout kernels: how a tensor is packed for an exchange and unpacked after it."""
