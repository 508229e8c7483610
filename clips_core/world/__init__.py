"""The sample world: coloured pictograms over varied backgrounds, with captions, conversations and benchmarks.

Everything is drawn from a seed, so that the whole path (pretraining, LLaVA, benchmarks) can be walked without a download,
and every answer is known. Read in this order: `settings` (what may occur), `scenes` (drawing), `captions`,
`conversations`, `benchmarks`, `build` (the folder). Imports no torch.
"""

from clips_core.world.build import make_world
from clips_core.world.settings import BenchmarkCounts, CaptionNoise, WorldConfig, WorldCounts

__all__ = ["BenchmarkCounts", "CaptionNoise", "WorldConfig", "WorldCounts", "make_world"]
