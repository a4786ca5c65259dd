"""Inference engines for concurrent requests with streaming: vLLM, and transformers where vLLM is not available.

    engine = VllmEngine.start(directory, EngineSettings())
    async for piece in engine.answer(Ask(prompt_ids=(1, 5, 9), max_tokens=32)):
        print(piece.text)

Plain asyncio, without HTTP or Ray. `generation` processes whole data sets; this package serves single requests.
"""
