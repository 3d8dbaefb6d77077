"""Results of the demo that several of its tests look at."""

import numpy as np
import pytest

from examples.demo import race, rules


@pytest.fixture(scope="session")
def results():
    """A race of orders 0, 1 and 2, at a rate that diverges and two that do not."""
    for package in ("sklearn", "tqdm"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "RULES", {name: rules.RULES[name] for name in ("sgd", "nesterov", "aggregated")})
        return race.race(seeds=2, epochs=2, effective_rates=(np.inf, 0.25, 0.5))


@pytest.fixture(scope="session")
def made_up():
    """A function that makes the result of a rule with these errors of its seeds at the end."""

    def result(rule, finals, rates=3, choice=1):
        test = np.ones((rates, len(finals), 2)) * np.reshape(finals, (1, -1, 1))
        validation = np.full((rates, len(finals)), 2.0)
        validation[choice] = 1.0
        return race.RaceResult(rule, np.arange(1.0, rates + 1), 2.0, validation, test)

    return result
