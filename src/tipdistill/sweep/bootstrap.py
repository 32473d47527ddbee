"""A paired bootstrap over seeds and problems."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


class Bootstrap:
    """The same redrawn seeds and problems for every table of S seeds × P problems, so that differences are paired.

    A draw of a mean ȳ over a table y [S, P] is

        ȳ + f · Σ_s (w_s − 1/S) ȳ_s· + Σ_p (v_p − 1/P) ȳ_·p

    with w and v the shares of seeds and of problems in a sample with replacement. f = √(S / (S − 1)) · t / z widens
    the part of the seeds, which are few: the plain bootstrap understates their variance by (S − 1) / S, and takes a
    normal quantile z where Student's t with S − 1 degrees of freedom is due. What is particular to a seed *and* a
    problem is in both parts, which errs on the side of caution. `tests/sweep/test_bootstrap.py` simulates the coverage.

    The draws are linear in y, so that those of a difference are the difference of the draws.

    Args:
        seeds, problems: S and P. With one seed the interval is over problems alone, and the other way round.
        draws: how many.
        seed: of the draws.

    Example:
        >>> table = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
        >>> draws = Bootstrap(2, 4).of(table)
        >>> draws.shape, bool(abs(draws.mean() - table.mean()) < 0.02)
        ((10000,), True)
    """

    def __init__(self, seeds: int, problems: int, draws: int = DRAWS, seed: int = 0) -> None:
        if seeds < 1 or problems < 1:
            raise ValueError(f"a bootstrap needs a seed and a problem at least, got {seeds} and {problems}.")
        random = np.random.default_rng(seed)
        self.shape = (seeds, problems)
        self._seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds - 1 / seeds
        self._seeds *= _widening(seeds)
        self._problems = random.multinomial(problems, np.full(problems, 1 / problems), draws) / problems - 1 / problems

    def of(self, table: np.ndarray) -> np.ndarray:
        """Draws of the mean of a table.

        Args:
            table: float [S, P], the score of each seed at each problem.

        Returns:
            float [draws].
        """
        assert table.shape == self.shape, f"a table of {self.shape} was announced, got {table.shape}"
        return table.mean() + self._seeds @ table.mean(axis=1) + self._problems @ table.mean(axis=0)


def interval(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The central interval that holds `level` of the draws.

    Example:
        >>> [round(end, 9) for end in interval(np.arange(1001))]
        [25.0, 975.0]
    """
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache
def _widening(seeds: int) -> float:
    """f, see `Bootstrap`; 1 for a single seed, whose deviations are all 0."""
    if seeds == 1:
        return 1.0
    return float(np.sqrt(seeds / (seeds - 1)) * student_t_quantile(seeds - 1) / 1.959964)


def student_t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, from its density, to three digits.

    Args:
        degrees: of freedom, at least 1.

    Example:
        >>> [round(student_t_quantile(degrees), 2) for degrees in (1, 2, 4, 100)]
        [12.71, 4.3, 2.78, 1.98]
    """
    # with t = √n · tan θ the integrand is cosⁿ⁻¹ θ on a finite range
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(degrees) * np.tan(np.interp(0.95, mass / mass[-1], angles)))
