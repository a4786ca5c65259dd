"""Fine-tuning on packed rows: plain PyTorch, the same loop for one process and for many.

from sdft_ray.training.loop import TrainPlan, train

summary = train(model, rows, TrainPlan(num_steps=100, rows_per_step=16, learning_rate=1e-4))
"""
