"""The device: pages, the jitted step, sampling, and the runner that carries out a Plan."""
