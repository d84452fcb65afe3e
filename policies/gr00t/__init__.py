"""GR00T N1.5, a flow policy whose action head reads the features of a vision-language model."""
