"""Training: labelled radiographs → a network → weights with an honest card.

The way of the films through the modules:

    sources/      what people have → dataset: films, studies, patients, labels, boxes
    data_report   what is in it, before hours are spent
    folds         patients in folds, nobody in two
    settings      what a run is made of; start: what a network begins with
    fit           two phases, epoch by epoch, into a run_folder that resumes
      prepared    films as the network sees them, in a mapped file; loader: drawn and augmented
      objectives  what is minimised besides the cross-entropy; optimisation: how fast
    search        settings by cross-validation within the training set
    crossval      each fold by a network that never saw it → a record
    evaluate      figures with intervals (metrics, localisation) → evaluation_report, plots
    calibration   logits → probabilities and thresholds
    publish       network and record → weights with cards
    report        records → the analytical note; pictures: films under their evidence
    retrain       all of it for a site, beside its daemon

``__main__`` and ``fit_commands`` give it flags.
"""
