"""Importance of blocks and channels: forward passes over a calibration set, reduced to scores."""
