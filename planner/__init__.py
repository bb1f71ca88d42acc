"""What will happen: memory arithmetic, candidates, the choice and the Plan.

Never imports torch and never probes hardware.
"""
