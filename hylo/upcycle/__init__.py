"""From a pretrained Transformer to a hybrid: bases, layouts, conversion, calibration."""
