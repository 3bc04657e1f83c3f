"""What an erasure did: is the concept gone, what else broke, and who can bring it back?

evaluate(original, edited, ["three"], classifier, suites, EvaluationConfig()) -> Evaluation
"""

from .classifiers import Classifier, ClipClassifier, GlyphsClassifier
from .figures import Counted, Drawn, Evaluation, EvaluationConfig, evaluate, known_attacks
from .frechet import frechet_distance
from .suites import Asked, Suites, glyphs_suites, phrase_suites, read_synonyms

__all__ = [
    "Asked",
    "Classifier",
    "ClipClassifier",
    "Counted",
    "Drawn",
    "Evaluation",
    "EvaluationConfig",
    "GlyphsClassifier",
    "Suites",
    "evaluate",
    "frechet_distance",
    "glyphs_suites",
    "known_attacks",
    "phrase_suites",
    "read_synonyms",
]
