"""The model in float16, bfloat16 and int8, and what keeps those safe."""
