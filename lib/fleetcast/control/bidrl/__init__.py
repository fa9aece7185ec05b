"""The learned agent: telemetry → latent state → scaling, routing and restarts. Ray in `rollouts` alone."""
