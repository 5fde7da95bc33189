"""How candidates are screened and judged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np

from emq_lib.core.checks import random_source, real_number, real_numbers, whole_number
from emq_lib.core.costs import choice_indices
from emq_lib.core.errors import CorruptArtefactError, InvalidParameterError
from emq_lib.core.journal import Journal
from emq_lib.evolution.evaluator import Evaluator
from emq_lib.evolution.genotypes import Genotype, canonical, parse
from emq_lib.evolution.spaces import Space
from emq_lib.proxies.ranking import fitness_many
from emq_lib.proxies.resampling import MINIMUM
from emq_lib.proxies.scores import SEPARABLE, is_table, score

ATTEMPTS = 400  # draws after which a valid random genotype is given up
# How fitness on several problems is put together.
ACROSS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": np.mean,
    "worst": np.min,
    "stable": lambda found: np.mean(found) - np.std(found),
}


@dataclass(frozen=True)
class Problem:
    """What candidates are judged on: configurations of one study and how accurate they are.

    Args:
        evaluator: computes scores.
        configs: bits, shape (N, S), N at least 30.
        accuracy: shape (N,).
        groups: rho is taken inside each of these groups of configurations and averaged; None: the paper's fitness, the
            mean of rho among the best 20, 50 and 100 % of all.

    Raises:
        InvalidParameterError: no evaluator, fewer than 30 configurations, another number of accuracies, accuracies that
            are all the same, or groups of other configurations or of fewer than three.
        InvalidScoreError: an accuracy is NaN, infinite or no number.
        ConfigLengthError, InvalidBitsError: configurations of another network.
    """

    evaluator: Evaluator
    configs: np.ndarray
    accuracy: np.ndarray
    groups: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        """Check that configurations and accuracies belong together and can be ranked."""
        if not isinstance(self.evaluator, Evaluator):
            raise InvalidParameterError(f"a problem needs an Evaluator, got {self.evaluator!r:.80}.")
        count = len(choice_indices(self.configs, self.evaluator.choices, self.evaluator.slots))
        if count < MINIMUM:
            raise InvalidParameterError(f"fitness needs {MINIMUM} configurations or more, got {count}.")
        accuracy = real_numbers(self.accuracy, "accuracies", ndim=1)
        if not (isinstance(self.configs, np.ndarray) and isinstance(self.accuracy, np.ndarray)):
            raise InvalidParameterError("configurations and accuracies must be NumPy arrays; np.array(...) makes them.")
        if self.configs.ndim != 2 or len(accuracy) != count:
            raise InvalidParameterError(
                f"configurations (N, S) need N accuracies, got {self.configs.shape} and {len(accuracy)}."
            )
        if np.ptp(accuracy) == 0:
            raise InvalidParameterError("all configurations are equally accurate, so nothing can be ranked.")
        for group in () if self.groups is None else self.groups or ((),):
            members = np.unique(group)
            if members.dtype.kind not in "iu" or len(members) < 3 or members[0] < 0 or members[-1] >= count:
                raise InvalidParameterError(f"a group needs three of the {count} configurations, got {group!r:.80}.")

    def inside_sizes(self, sizes: np.ndarray, bins: int) -> Problem:
        """Return the problem of ranking configurations of similar size: so many bins of equally many.

        Args:
            sizes: shape (N,).
            bins: how many.

        Raises:
            InvalidScoreError: a size is NaN, infinite or no number.
            InvalidParameterError: another number of sizes, or bins of fewer than three configurations.
        """
        bins = whole_number(bins, "the number of bins", 1)
        if len(real_numbers(sizes, "sizes", ndim=1)) != len(self.configs) or 3 * bins > len(self.configs):
            raise InvalidParameterError(
                f"{len(self.configs)} configurations need as many sizes, and three or more in each bin; got "
                f"{len(sizes)} and {bins} bins."
            )
        return replace(self, groups=tuple(np.array_split(np.argsort(sizes, kind="stable"), bins)))

    def resampled(self, times: int, *, rng: np.random.Generator) -> list[Problem]:
        """Return so many problems of half the configurations each, against fitting a formula to all of them.

        Raises:
            InvalidParameterError: no number of times, no source of randomness, or halves of fewer than 30.
        """
        random_source(rng)
        whole_number(times, "the number of halves", 1)
        halves = [rng.permutation(len(self.configs))[: len(self.configs) // 2] for _ in range(times)]
        return [replace(self, configs=self.configs[half], accuracy=self.accuracy[half]) for half in halves]

    def fitness(self, scores: np.ndarray) -> float:
        """Return the fitness of the scores (N,); NaN where they rank nothing.

        Raises:
            InvalidScoreError: another number of scores.
        """
        if self.groups is None:
            return float(fitness_many(scores[None], self.accuracy)[0])
        inside = [fitness_many(scores[None, group], self.accuracy[group], (100,))[0] for group in self.groups]
        return float(np.mean(inside))


@dataclass(frozen=True)
class Individual:
    """A genotype that was judged.

    Attributes:
        genotype: with all its genes, those that do nothing too.
        fitness: on the search half.
        fingerprint: of the order in which it ranks the configurations.
    """

    genotype: Genotype
    fitness: float
    fingerprint: str


class Judgements:
    """Judgements of one run in its journal, a line each: a run that starts again reads them instead of computing them.

    A search is the same for the same random numbers, so a run that was killed goes through its generations again
    without evaluating anything, and goes on where it was; what it had not written, at most the candidates of one
    generation, is lost.

    Args:
        journal: of this run.

    Raises:
        CorruptArtefactError: a line is no judgement.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal, self._known = journal, {}
        for number, line in enumerate(journal.lines, start=2):
            try:
                found = self._read(line)
                if self._known.setdefault(line["genotype"], found) != found:
                    raise ValueError("it differs from an earlier one")
            except (KeyError, TypeError, ValueError) as error:
                raise CorruptArtefactError(
                    f"{journal.path}, line {number}, is no judgement ({error}). Delete the file to start afresh."
                ) from error

    @staticmethod
    def _read(line: Mapping) -> Individual | None:
        genotype, fitness, fingerprint = parse(line["genotype"]), line["fitness"], line["fingerprint"]
        if fitness is None and fingerprint is None:
            return None
        if not (isinstance(fitness, float) and np.isfinite(fitness) and isinstance(fingerprint, str)):
            raise ValueError(f"fitness {fitness!r}, fingerprint {fingerprint!r}")
        return Individual(genotype, fitness, fingerprint)

    def find(self, genotype: Genotype) -> tuple[bool, Individual | None]:
        """Return whether a genotype was judged, and how."""
        key = str(genotype)
        return key in self._known, self._known.get(key)

    def append(self, genotype: Genotype, found: Individual | None) -> None:
        """Write a judgement.

        Raises:
            DiskFullError, UnwritablePathError: see :meth:`emq_lib.core.journal.Journal.append`.
        """
        fitness, fingerprint = (found.fitness, found.fingerprint) if found else (None, None)
        self._journal.append({"genotype": str(genotype), "fitness": fitness, "fingerprint": fingerprint})


@dataclass
class Judge:
    """Screens candidates and evaluates their fitness.

    Args:
        problems: of one study or of several.
        across: how fitness on several problems is put together: "mean", "worst", or "stable", the mean less the
            standard deviation.
        penalty: fitness that each operation of a formula costs.
        separable: whether formulas must be sums over layers.
        rising: whether a layer must never score lower with more bits, as an optimizer that looks for the highest score
            needs it.
        screening: whether equivalent candidates are recognized; rejection of broken ones is always on.
        journal: where judgements are kept.

    Attributes:
        evaluations: candidates whose fitness was computed.
        rejected: candidates that were turned away before.
        duplicates: candidates that were recognized.

    Raises:
        InvalidParameterError: no problems, another way to put them together, or a penalty that is no finite number of 0
            or more.
    """

    problems: Sequence[Problem]
    across: str = "mean"
    _: KW_ONLY
    penalty: float = 0.0
    separable: bool = False
    rising: bool = False
    screening: bool = True
    journal: Judgements | None = None
    evaluations: int = field(default=0, init=False)
    rejected: int = field(default=0, init=False)
    duplicates: int = field(default=0, init=False)
    _known: dict[Genotype, Individual | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check what fitness is made of."""
        several = isinstance(self.problems, Sequence) and all(isinstance(one, Problem) for one in self.problems)
        if not several or not self.problems:
            raise InvalidParameterError(f"a judge needs a list of one Problem or more, got {self.problems!r:.80}.")
        if not (isinstance(self.across, str) and self.across in ACROSS):
            raise InvalidParameterError(f"unknown way {self.across!r:.80} across problems; known: {', '.join(ACROSS)}.")
        real_number(self.penalty, "the penalty of an operation", 0, math.inf, ends=True)

    def judge(self, genotype: Genotype) -> Individual | None:
        """Return the candidate with its fitness, or None if its scores are not finite or rank nothing.

        Raises:
            GenotypeSyntaxError: it is no genotype.
            DiskFullError, UnwritablePathError: the journal cannot be written.
        """
        key = canonical(genotype)
        if self.screening and key in self._known:
            self.duplicates += 1
            found = self._known[key]
            return found and replace(found, genotype=genotype)
        judged, found = self.journal.find(key) if self.journal else (False, None)
        if not judged:
            found = self._evaluate(key)
            if self.journal:
                self.journal.append(key, found)
        self._known[key] = found
        if found is None:
            self.rejected += 1
            return None
        self.evaluations += 1
        return replace(found, genotype=genotype)

    def judge_many(self, genotypes: Sequence[Genotype]) -> list[Individual | None]:
        """Return what :meth:`judge` does of each, evaluated together as far as the evaluators can. Errors: as there."""
        for evaluator in dict.fromkeys(problem.evaluator for problem in self.problems):
            evaluator.prepare(genotypes)
        return list(map(self.judge, genotypes))

    def _evaluate(self, genotype: Genotype) -> Individual | None:
        order, found, tables = hashlib.blake2b(digest_size=8), [], {}
        for problem in self.problems:
            evaluator = problem.evaluator
            if evaluator not in tables:
                tables[evaluator] = evaluator.scores(genotype)
            table = tables[evaluator]
            separable = is_table(table, evaluator.choices)
            if not np.isfinite(table).all() or (separable and (table == table[:, :1]).all()):
                return None
            if self.separable and not (separable and genotype.aggregation in SEPARABLE):
                return None
            if self.rising and separable and (np.diff(table, axis=1) < 0).any():
                return None
            scores = score(table, problem.configs, evaluator.choices, aggregation=genotype.aggregation)
            order.update(np.argsort(scores, kind="stable").astype(np.int32).tobytes())
            found.append(problem.fitness(scores))
        fitness = float(ACROSS[self.across](found) - self.penalty * genotype.complexity)
        return Individual(genotype, fitness, order.hexdigest()) if np.isfinite(fitness) else None

    def newcomer(self, space: Space, rng: np.random.Generator, taken: Iterable[str] = ()) -> Individual:
        """Return the first drawn candidate that is valid and ranks unlike those taken.

        Raises:
            InvalidParameterError: none of 400 draws is: the statistics are constant, or the space is too small.
        """
        for _ in range(ATTEMPTS):
            candidate = self.judge(space.random(rng))
            if candidate is not None and candidate.fingerprint not in taken:
                return candidate
        raise InvalidParameterError(
            f"none of {ATTEMPTS} random genotypes is valid and ranks unlike those that are there; look at the "
            "statistics, or search a larger space."
        )
