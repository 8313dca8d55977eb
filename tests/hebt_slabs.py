"""Run by tests/test_hebt.py in a process of its own: three CPU devices, since JAX counts them only once.

Prints the relative distance between one slab and three, of five planes, for each kind of solve.
"""

from engine import phantoms_hebt, physics, signals
from engine.hebt import Settings, reconstruct_batch
from tests.specimens import distance


def main() -> None:
    names = tuple(phantoms_hebt.ELEMENTS)
    lines = physics.emissions(names, phantoms_hebt.BEAM_KEV, phantoms_hebt.LINES)
    data = signals.bimodal(phantoms_hebt.phantom(24, planes=5), lines, pixel_size=phantoms_hebt.FIELD_NM / 24,
                           chem_angles=phantoms_hebt.ANGLES[::2], haadf_angles=phantoms_hebt.ANGLES)
    cases = [("eds", "preconditioned", (0.8,)), ("haadf", "paper", (0.8,)), ("hebt", "paper", (0.8,)),
             ("hebt", "preconditioned", (0.5, 0.9))]
    for method, form, alphas in cases:
        alone, slabs = (reconstruct_batch(data, [Settings(method, form, alpha=alpha, devices=devices)
                                                 for alpha in alphas]) for devices in (1, 3))
        for a, b in zip(alone, slabs):
            print(distance(b.volume, a.volume), method, form)


if __name__ == "__main__":
    main()
