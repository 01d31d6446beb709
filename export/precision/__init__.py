"""The model in float16, bfloat16 and int8, with the checks that keep them safe."""
