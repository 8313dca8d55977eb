"""Cross sections that turn X-ray counts and HAADF intensities into amounts of an element, with their sources.

X-rays of a thin film (HEBT Eq. 4, 7):  counts = N_A D (Omega / 4 pi) f C rho t,   f = sigma_ion omega p efficiency / M
HAADF (Eq. 13, 14):                     electrons = N_A D z C rho t,               z = sigma_ela / M

sigma_ion: ionisation of the line's subshell, omega: its fluorescence yield, p: the line's share of its X-rays,
M: atomic weight [g/mol]; f and z are in barn mol/g. `PAPER` is Table 2 of HEBT, from the Monte Carlo program MC X-ray.
For any other line and beam energy `emission` takes

  sigma_ion  E. Casnati, A. Tartari, C. Baraldi, J. Phys. B 15 (1982) 155, an empirical formula for inner shells, and
             the vacancies that Coster-Kronig transitions bring from the subshells above
  omega, p, edges, Coster-Kronig, M, attenuation    xraylib (T. Schoonjans et al., Spectrochim. Acta B 66 (2011) 776)
  sigma_ela  R. Browning, Appl. Phys. Lett. 58 (1991) 2845, total elastic (Mott)

xraylib is the optional extra `tables`, imported when it is needed. Everything imports without JAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np

from engine.data import DataError

# N_A x barn x nm x g/cm^3 over g/mol: factors [barn mol/g] times C rho t [g/cm^3 nm] times this are probabilities.
AVOGADRO = 6.02214076e23 * 1e-24 * 1e-7
PAPER_EFFICIENCY = 0.96  # of the detector: what HEBT's printed f of Co (2.25) and Zn (1.84) have over Table 2

ELECTRON = 1.602176634e-19  # [C]

_BOHR_BARN = 0.529177210903**2 * 1e8  # a_0^2
_RYDBERG, _REST = 0.013605693, 510.99895  # [keV]
_SUBSHELLS = {"K": ("K",), "L": ("L1", "L2", "L3"), "M": ("M1", "M2", "M3", "M4", "M5")}
_ELECTRONS = {"K": 2, "L1": 2, "L2": 2, "L3": 4, "M1": 2, "M2": 2, "M3": 4, "M4": 4, "M5": 6}
_LINES = {"Ka": ("K", ("KL3_LINE", "KL2_LINE")), "La": ("L3", ("L3M5_LINE", "L3M4_LINE")),
          "Ma": ("M5", ("M5N7_LINE", "M5N6_LINE"))}


@dataclass(frozen=True)
class Emission:
    """What an element sends out where a beam meets it: an X-ray line, and elastically scattered electrons.

    ionisation, elastic: [barn]. fluorescence, share: of the vacancies, and of their X-rays. weight: [g/mol].
    beam: [keV]. source: a sentence for reports.
    """

    element: str
    line: str
    beam: float
    ionisation: float
    fluorescence: float
    share: float
    elastic: float
    weight: float
    source: str

    def f(self, efficiency: float = 1.0) -> float:
        """Eq. 7 [barn mol/g]; efficiency: of the detector for this line."""
        return self.ionisation * self.fluorescence * self.share * efficiency / self.weight

    @property
    def z(self) -> float:
        """Eq. 14 [barn mol/g]."""
        return self.elastic / self.weight

    def partial(self, solid_angle: float, efficiency: float = 1.0) -> float:
        """The partial cross section f Omega / (4 pi) M [barn] of Eq. 3; solid_angle: [sr]."""
        return self.f(efficiency) * solid_angle / (4 * np.pi) * self.weight


_SOURCE = "HEBT, Table 2 (MC X-ray)"
PAPER = {(each.element, each.line, each.beam): each for each in (
    Emission("Ag", "La", 100.0, 2.44e3, 0.057, 0.816, 9.90e6, 107.868, _SOURCE),
    Emission("Au", "Ma", 100.0, 7.46e3, 0.030, 0.999, 1.98e7, 196.967, _SOURCE),
    Emission("Co", "Ka", 80.0, 420.0, 0.369, 0.891, 5.59e6, 58.933, _SOURCE),
    Emission("Zn", "Ka", 80.0, 302.0, 0.466, 0.890, 6.51e6, 65.38, _SOURCE),
)}


def emissions(elements: Sequence[str], beam: float, lines: Mapping[str, str] | None = None,
              source: Literal["auto", "paper", "tables"] = "auto") -> list[Emission]:
    """`emission` of each element; lines: by element, {"Au": "Ma"}, any other element's is `usual_line`.

    source: `auto` takes Table 2 where it has all of them, else the open tables for all: the two differ by 1.3 for L
    lines, which must not end up in a ratio.
    """
    chosen = [(lines or {}).get(element) for element in elements]
    if source == "auto":
        source = "paper" if all(_printed(e, beam, line) for e, line in zip(elements, chosen)) else "tables"
    return [emission(element, beam, line, source) for element, line in zip(elements, chosen)]


def emission(element: str, beam: float, line: str | None = None,
             source: Literal["paper", "tables"] = "tables") -> Emission:
    """An element's line (Ka, La or Ma) and elastic scattering at a beam energy [keV].

    source: `paper` is HEBT's Table 2; `tables` are the open ones above. They agree within 6 % in f for K lines. For Ag
    La the subshell's own ionisation is within 1 % of Table 2's, which leaves out the vacancies handed down from L1 and
    L2; with them f is 1.3 times as large. DataError where there is no such line.
    """
    if source == "paper":
        found = _printed(element, beam, line)
        if not found:
            raise DataError(f"HEBT's Table 2 has no {element} {line or 'line'} at {beam:g} keV; it has "
                            + ", ".join(f"{e} {name} at {energy:g} keV" for e, name, energy in PAPER)
                            + "; take source: tables")
        return found[0]
    x, number = tables(f"the {element} {line or 'line'} at {beam:g} keV"), atomic_number(element)
    line = line or usual_line(number)
    if line not in _LINES:
        raise DataError(f"{element}: the line {line!r} is not known; give one of {', '.join(_LINES)}")
    subshell, parts = _LINES[line]
    share = sum(_number(x.RadRate, number, getattr(x, part)) for part in parts)
    ionised = _vacancies(x, number, subshell, beam)
    fluorescence = _number(x.FluorYield, number, _shell(x, subshell))
    if not share * ionised * fluorescence > 0:
        raise DataError(f"{element}: a beam of {beam:g} keV gives no {line} line; choose another of "
                        f"{', '.join(_LINES)}")
    return Emission(element, line, beam, ionised, fluorescence, share, elastic(number, beam), x.AtomicWeight(number),
                    "Casnati 1982, Browning 1991, xraylib")


def usual_line(number: int) -> str:
    """The line that an element is usually quantified by at 80 to 300 kV: Ka up to Ge, La up to Hf, then Ma."""
    return "Ka" if number <= 32 else "La" if number <= 72 else "Ma"


def atomic_number(element: str) -> int:
    """By its symbol; DataError where there is no such element."""
    number = next((k for k, symbol in enumerate(SYMBOLS, 1) if symbol == element), 0)
    if not number:
        raise DataError(f"{element!r} is no element; give its symbol, as in Ag")
    return number


def atomic_weights(elements: Sequence[str]) -> np.ndarray:
    """(element,) [g/mol]; from Table 2 where it has them, else from xraylib."""
    known = {each.element: each.weight for each in PAPER.values()}
    return np.array([known[e] if e in known else tables(f"the atomic weight of {e}").AtomicWeight(atomic_number(e))
                     for e in elements])


def elastic(number: int, beam: float) -> float:
    """Total elastic cross section [barn] of an atom for electrons of so many keV (Browning 1991).

    It is within 0.5 % of Table 2 for Co and Zn, within 2 % for Ag and Au.
    """
    u = np.log10(8 * beam * number**-1.33)
    rutherford = 4.7e-18 * (number**1.33 + 0.032 * number**2) / (beam + 0.0155 * number**1.33 * np.sqrt(beam))
    return float(1e24 * rutherford / (1 - 0.02 * np.sqrt(number) * np.exp(-(u**2))))


def ionisation(edge: float, electrons: int, beam: float) -> float:
    """Cross section [barn] to ionise a subshell of so many electrons, bound by `edge` [keV] (Casnati 1982)."""
    u = beam / edge
    if u <= 1:
        return 0.0
    j = _REST / edge
    fast = u * (u + 2 * j) * (1 + j) ** 2
    relativity = ((1 + 2 * j) / (u + 2 * j) * ((u + j) / (1 + j)) ** 2
                  * ((1 + u) * (u + 2 * j) * (1 + j) ** 2 / (j**2 * (1 + 2 * j) + fast)) ** 1.5)
    phi = (edge / _RYDBERG) ** (-0.0318 + 0.3160 / u - 0.1135 / u**2)
    psi = 10.57 * np.exp(-1.736 / u + 0.317 / u**2)
    return float(electrons * _BOHR_BARN * relativity * (_RYDBERG / edge) ** 2 * phi * psi * np.log(u) / u)


def attenuation(element: str, energy: float) -> float:
    """Mass attenuation coefficient [cm^2/g] of an element for X-rays of so many keV (xraylib)."""
    return float(tables("X-ray attenuation").CS_Total(atomic_number(element), energy))


def line_energy(element: str, line: str) -> float:
    """[keV], of the strongest part of a line (xraylib)."""
    x = tables(f"the energy of {element} {line}")
    return float(x.LineEnergy(atomic_number(element), getattr(x, _LINES[line][1][0])))


def density(element: str) -> float:
    """[g/cm^3] of the pure element (xraylib)."""
    return float(tables(f"the density of {element}").ElementDensity(atomic_number(element)))


def wavelength(voltage: float) -> float:
    """[nm] of electrons that were accelerated by `voltage` [kV], relativistic."""
    from scipy import constants  # here, as settings are read without scipy

    volts, rest = 1e3 * voltage, constants.m_e * constants.c**2 / constants.e
    return float(constants.h / np.sqrt(2 * constants.m_e * constants.e * volts * (1 + volts / (2 * rest))) * 1e9)


def fluence(current: float, dwell: float, pixel: float) -> float:
    """Electrons per square Angstrom of a scan whose probe of `current` [pA] stays `dwell` [us] on each pixel [nm]."""
    return current * 1e-12 * dwell * 1e-6 / ELECTRON / (10 * pixel) ** 2


def tables(need: str) -> Any:
    """xraylib; DataError with what it is needed for where it is not installed."""
    try:
        return import_module("xraylib")
    except ImportError:
        raise DataError(f"{need} comes from xraylib, which is not installed: pip install \"tomoatlas[tables]\", or "
                        "give factors of your own") from None


def _printed(element: str, beam: float, line: str | None) -> list[Emission]:
    """What Table 2 has of an element at this energy, of one line or of any."""
    return [each for each in PAPER.values() if each.element == element and each.beam == beam
            and line in (None, each.line)]


def _vacancies(x: Any, number: int, subshell: str, beam: float) -> float:
    """Vacancies per electron and area [barn] in a subshell: its ionisation, and what those above hand down."""
    shells = _SUBSHELLS[subshell[0]]
    found: list[float] = []
    for k, shell in enumerate(shells[:shells.index(subshell) + 1]):
        edge = _number(x.EdgeEnergy, number, _shell(x, shell))
        own = ionisation(edge, _ELECTRONS[shell], beam) if edge > 0 else 0.0
        handed = (found[j] * _number(x.CosKronTransProb, number, getattr(x, f"F{shells[0][0]}{j + 1}{k + 1}_TRANS"))
                  for j in range(k))
        found.append(own + sum(handed))
    return found[-1]


def _shell(x: Any, subshell: str) -> int:
    return getattr(x, f"{subshell}_SHELL")


def _number(function: Any, *arguments: int) -> float:
    """What xraylib has, 0 where it has nothing (it raises for a line or shell that an atom has not)."""
    try:
        return float(function(*arguments))
    except ValueError:
        return 0.0


SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu "
    "Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr "
    "Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og").split()
