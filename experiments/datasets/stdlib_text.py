"""Characters of the Python standard library's source, for language models, without a download.

Every tenth module (in alphabetical order) is the test split. The text depends on the Python version,
so the version is part of the data set's name: stdlib_text/py3_11_7.
"""

import pathlib
import platform
import sysconfig

import numpy as np
import tensorflow_datasets as tfds

LENGTH = 256
_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


class StdlibText(tfds.core.GeneratorBasedBuilder):
    """`tokens` is uint8 [257]: 256 characters and the next one. ASCII; anything else is `?`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="py" + platform.python_version().replace(".", "_"))
    ]

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"tokens": tfds.features.Tensor(shape=(LENGTH + 1,), dtype=np.uint8)}
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=features,
            homepage="https://docs.python.org/3/library/",
        )

    def _split_generators(self, dl_manager):
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        files = sorted(
            path
            for path in root.rglob("*.py")
            if not _SKIP.intersection(path.relative_to(root).parts)
        )
        train = [path for i, path in enumerate(files) if i % 10 != 9]
        return {
            "train": self._generate_examples(train),
            "test": self._generate_examples(files[9::10]),
        }

    def _generate_examples(self, files):
        text = "\n".join(path.read_text("utf-8", errors="replace") for path in files)
        tokens = np.frombuffer(text.encode("ascii", errors="replace"), np.uint8)
        # Consecutive rows share one character: it is the last target of one, the first of the next.
        for i, start in enumerate(range(0, len(tokens) - LENGTH, LENGTH)):
            yield i, {"tokens": tokens[start : start + LENGTH + 1]}
