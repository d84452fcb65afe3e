"""π₀ (arXiv 2410.24164) and π₀.₅ (arXiv 2504.16054): a vision-language model and an action expert that share attention."""
