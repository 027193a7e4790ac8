"""From images on disk to micro-batches on the device; nothing walks back but one integer, samples_seen."""
