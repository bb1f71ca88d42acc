"""This machine: its devices and memory, the monitor, calibration, the doctor."""
