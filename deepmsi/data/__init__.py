"""Manifests, decoding, checking, and the prepared folder that training reads.

Import from the modules: ``manifest.read_manifest``, ``decode.decode_frames``, ``decode.decode_audio``,
``media.probe``, ``check.check``, ``prepare.prepare``, ``store.PreparedData``. The package itself imports
none of them, so that reading a manifest costs neither PyAV nor pydantic.
"""
