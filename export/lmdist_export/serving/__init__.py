"""A bundle as a service: requests batched over one sampler, MLflow's model and registry."""
