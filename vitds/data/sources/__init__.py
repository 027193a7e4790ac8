"""Where images come from: every kind of source becomes the same thing, rows of (key, label, image bytes).

| SOURCE                                   | what it is                                                              |
|------------------------------------------|-------------------------------------------------------------------------|
| a directory of class folders             | one split, train unless told otherwise                                  |
| a directory with train/, val/ above them | these, in any case; `test` is taken for validation where nothing else is |
| ILSVRC2012_img_train.tar, ..._val.tar    | the official archives, or their directory: read in place; validation    |
|                                          | takes its labels from ILSVRC2012_devkit_t12.tar.gz beside it            |
| a parquet file, or a directory of them   | Hugging Face's layout; splits by the names of files or folders; labels  |
|                                          | integers or names, one or a list                                        |
| https://, s3://, gs://, hf://...parquet  | the same from an address, or from several by braces; downloaded first   |
| a .csv, .tsv or .parquet table           | path, label and, if it likes, split: paths relative to it, labels names |
|                                          | or integers, several as `cat|dog` or a list                             |
| a directory of .tar, one, or a pattern   | WebDataset shards, as `train-{000..127}.tar`; splits by names, as above |
| a CIFAR archive, or its folder           | train and val (its 10,000 test images), as lossless PNG                 |
| the words `cifar10`, `cifar100`          | the same, downloaded by torchvision                                     |
| the word `digits`                        | scikit-learn's 1,797 digits; digit i is validation when i % 5 == 0      |
"""

from vitds.data.sources.base import Source, read_classes
from vitds.data.sources.held_out import hold_out
from vitds.data.sources.open import open_source
from vitds.data.sources.pixels import PixelSource

__all__ = ["PixelSource", "Source", "hold_out", "open_source", "read_classes"]
