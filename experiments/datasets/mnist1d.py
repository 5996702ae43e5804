"""MNIST-1D (Greydanus, "Scaling down deep learning", 2020): 4000 + 1000 signals of 40 samples.

Generated here by the author's package with its default seed; nothing is downloaded.
Published test accuracy: logistic regression 32 %, MLP 68 %, CNN 94 %.
"""

import numpy as np
import tensorflow_datasets as tfds


class Mnist1d(tfds.core.GeneratorBasedBuilder):
    """`signal` is float32 [40, 1] with mean 0 and variance 1; `label` is 0 to 9."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "signal": tfds.features.Tensor(shape=(40, 1), dtype=np.float32),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=features,
            supervised_keys=("signal", "label"),
            homepage="https://github.com/greydanus/mnist1d",
        )

    def _split_generators(self, dl_manager):
        from mnist1d.data import get_dataset_args, make_dataset

        state = np.random.get_state()  # noqa: NPY002 - make_dataset seeds it
        try:
            data = make_dataset(get_dataset_args())
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return {
            "train": self._generate_examples(data["x"], data["y"]),
            "test": self._generate_examples(data["x_test"], data["y_test"]),
        }

    def _generate_examples(self, signals, labels):
        for i, (signal, label) in enumerate(zip(signals, labels)):
            yield i, {"signal": signal[:, None].astype(np.float32), "label": int(label)}
