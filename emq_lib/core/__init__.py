"""The core: profiles, images, networks, quantizers, costs, errors, files that are written whole or not at all."""
