"""HOIDiffusion: object meshes in, annotated pictures of hands grasping them out."""
