"""Put any vision tower into a LLaVA."""
