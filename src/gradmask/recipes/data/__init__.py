"""Images: where they come from, splits, noise, augmentation."""
