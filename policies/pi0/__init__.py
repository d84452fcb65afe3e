"""π₀ (arXiv 2410.24164) and π₀.₅ (arXiv 2504.16054): an action expert that reads a vision-language model."""
