"""`tokred.profile`: where the time of a pass goes, layer by layer, beside the dense model.

profile = tokred.profile(model, images, "tome", keep_rate=0.5)
print(profile)  # a table of layers, and where merging costs more than it saves
profile.plot()
"""
