"""Handwritten digits of 8x8 pixels (UCI; shipped with scikit-learn): 1497 + 300 examples."""

from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """`image` is uint8 [8, 8, 1] with values 0 to 16; `label` is 0 to 9."""

    VERSION = tfds.core.Version("1.0.0")
    NUM_TEST = 300

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                # Not features.Image: its encoder needs TensorFlow.
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        data: Any = load_digits()
        # The file is ordered by writer: shuffle once, so that both splits have all of them.
        order = np.random.default_rng(0).permutation(len(data.target))
        images = data.images[order, :, :, None].astype(np.uint8)
        labels = data.target[order]
        test, train = np.split(np.arange(len(order)), [self.NUM_TEST])
        return {
            "train": self._generate_examples(images[train], labels[train]),
            "test": self._generate_examples(images[test], labels[test]),
        }

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels)):
            yield i, {"image": image, "label": int(label)}
