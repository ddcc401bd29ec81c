"""The control plane: takes job files, fits them into memory, gangs them onto GPUs, keeps them alive."""
