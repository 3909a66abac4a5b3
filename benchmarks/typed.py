"""Command lines that hold a mistake: the command, what is typed, and the word that the one line must hold."""

from __future__ import annotations

from collections.abc import Iterator

SETTINGS: tuple[tuple[str, str], ...] = tuple((line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in """\
experiment.name ..
experiment.name a/b
experiment.name ""
experiment.device banana
experiment.device cuda:99999
experiment.seed -1
experiment.seed 1e30
experiment.seed 99999999999999999999999
experiment.precision float8
experiment.output_dir 5
experiment.color red
dataset.name ..
dataset.layout circle
dataset.root nowhere
dataset.root study.json
dataset.root [1]
dataset.image_size 32
dataset.image_size [32]
dataset.image_size [0,32]
dataset.image_size [65536,65536]
dataset.image_size [32,32,32,32]
dataset.image_size ["a","b"]
dataset.spacing_mm 0
dataset.spacing_mm NaN
dataset.spacing_mm Infinity
dataset.exclude ["nobody"]
dataset.unlabelled_dirs ["nowhere"]
dataset.max_megapixels -1
dataset.max_megapixels 0.0001
dataset.description nowhere.json
dataset.canvas_size [16,16]
dataset.resample_mm 1e-9
unet.base_channels 0
unet.base_channels 1000000
unet.base_channels 8.5
unet.channel_multipliers []
unet.channel_multipliers [0]
unet.attention_heads 0
unet.colour 1
ddpm.iterations 0
ddpm.iterations -4
ddpm.iterations "four"
ddpm.checkpoint_iterations [9]
ddpm.checkpoint_iterations []
ddpm.batch_size 0
ddpm.batch_size 1000000000
ddpm.sample_count 1000000000
ddpm.num_train_timesteps 1000000000000
ddpm.beta_start 0.5
ddpm.beta_end 1e400
ddpm.save_every 0
finetune.backbones ["vgg"]
finetune.backbones []
finetune.backbones "ddpm"
finetune.shots [0]
finetune.shots [1000]
finetune.shots 5
finetune.draws [-1]
finetune.seeds ["a"]
finetune.iterations 0
finetune.batch_size -2
finetune.sigma 0
finetune.sigma NaN
finetune.ema_decay 2
finetune.learning_rate.scratch -1
finetune.learning_rate.vgg 1
finetune.checkpoint nowhere.safetensors
finetune.checkpoint data
finetune.accumulation 1000000000
finetune.self_training.rounds -1
finetune.self_training.share 2
evaluation.sdr_thresholds [-1]
evaluation.sdr_thresholds ["x"]
evaluation.split holidays
evaluation.overlays -1
evaluation.batch_size 0
evaluation.folds 1
evaluation.decoder guess
nothing 1
dataset 5
finetune []""".splitlines())

LINES: tuple[tuple[str, str, str], ...] = (
    ("plan", "--set experiment", "section.key=value"), ("plan", "--stages dance", "dance"),
    ("plan", "--shots x", "--shots"), ("plan", "--seeds -1", "seeds"), ("plan", "--workers x", "--workers"),
    ("plan", "--set experiment.name.x=1", "experiment.name"), ("plan", "--dance", "--dance"),
    ("launch alone", "--config nowhere.json", "nowhere.json"), ("launch alone", "--config data", "data"),
    ("launch alone", "--config data/images/p00.png", "p00.png"), ("launch alone", "--config", "--config"),
    ("launch alone", "--config study.json --workers 0", "--workers"),
    ("launch alone", "--config study.json --gpus 9", "--gpus"),
    ("launch alone", "--config study.json --slurm --workers 2", "--slurm"),
    ("launch alone", "--config study.json --stages finetune --set experiment.name=new", "pretrain"),
    ("launch alone", "--config study.json --set experiment.output_dir=study.json", "study.json"),
    ("launch alone", "--config study.json --set experiment.output_dir=/proc/nowhere", "/proc"),
    ("launch alone", "--config study.json --set dataset.cache_dir=study.json experiment.name=new", "study.json"),
    ("train", "--backbone vgg --shots 2", "vgg"), ("train", "--backbone scratch", "--shots"),
    ("train", "--shots 2", "--backbone"), ("train", "--backbone scratch --shots 0", "shots"),
    ("train", "--backbone scratch --shots 99", "99"), ("train", "--backbone scratch --shots -1", "shots"),
    ("train", "--backbone scratch --shots 2 --draw -1", "draw"),
    ("train", "--backbone scratch --shots 2 --seed -1", "--seed"),
    ("train", "--backbone scratch --shots 2 --seed 99999999999999999999", "seed"),
    ("train", "--backbone scratch --shots 2 --draw 99999999999999999999", "draw"),
    ("train", "--backbone scratch --shots 2 --fold 1", "--fold"),
    ("train", "--backbone scratch --shots 2 --encoder vgg19", "--encoder"),
    ("train", "--backbone scratch --shots 2 --resume first", "--resume"),
    ("train", "--backbone mean_shape --shots 2", "mean_shape"),
    ("train", "--backbone simclrv2 --shots 2", "simclrv2"),
    ("train", "--backbone scratch --shots 2 --resume previous --set experiment.name=new", "previous"),
    ("pretrain", "--resume previous --set experiment.name=new", "previous"),
    ("pretrain", "--set ddpm.learning_rate=0.5", "learning_rate"),
    ("ssl", "--method vgg", "--method"), ("ssl", "", "--method"),
    ("ssl", "--method dino --set ssl.iterations=0", "ssl.iterations"),
    ("sample alone", "--count 0", "--count"), ("sample alone", "--count 1000000000", "--count"),
    ("sample alone", "--count x", "--count"), ("sample alone", "--iteration 77", "iter000077"),
    ("sample alone", "--iteration -1", "iteration"), ("sample alone", "--seed -1", "--seed"),
    ("sample alone", "--seed 99999999999999999999", "--seed"), ("sample alone", "--sampler dice", "--sampler"),
    ("sample alone", "--weights study.json", "study.json"), ("sample alone", "--weights nowhere.pt", "nowhere.pt"),
    ("sample alone", "--weights data", "data"), ("sample alone", "--weights trained/best.safetensors", "best"),
    ("sample alone", "--count 1 --out study.json/x.png", "study.json"),
    ("sample alone", "--count 1 --out data", "data"),
    ("evaluate alone", "", "run_dir"), ("evaluate alone", "nowhere", "nowhere"), ("evaluate alone", "data", "data"),
    ("evaluate alone", "study.json", "study.json"), ("evaluate alone", "trained --decoder dice", "dice"),
    ("evaluate alone", "trained --set dataset.root=nowhere", "nowhere"),
    ("evaluate alone", "trained --set evaluation.split=holidays", "evaluation.split"),
    ("evaluate alone", "trained --with nowhere", "nowhere"), ("evaluate alone", "trained --with data", "data"),
    ("evaluate alone", "trained --data nowhere", "nowhere"), ("evaluate alone", "trained --data volumes", "volumes"),
    ("evaluate alone", "trained --data volumes.json", "volumes"),
    ("evaluate alone", "trained --out study.json --decoder argmax", "study.json"),
    ("evaluate alone", "trained --set dataset.image_size=[64,64]", "image_size"),
    ("launch alone", "--config study.json --set finetune.checkpoint=study.json --dry-run", "study.json"),
    ("predict alone", "", "run_dir"), ("predict alone", "trained data/images", "--out"),
    ("predict alone", "nowhere data/images --out new", "nowhere"), ("predict alone", "data data --out new", "data"),
    ("predict alone", "trained nowhere --out new", "nowhere"),
    ("predict alone", "trained volumes/images --out new", "volumes"),
    ("predict alone", "trained study.json --out new", "study.json"),
    ("predict alone", "trained labels --out new", "labels"),
    ("predict alone", "trained data/images data/images/p00.png --out new", "p00"),
    ("predict alone", "trained data/images --out study.json", "study.json"),
    ("predict alone", "trained data/images --out new --format word", "--format"),
    ("predict alone", "trained data/images/p00.png --out new --format slicer", "slicer"),
    ("predict alone", "trained data/images --out new --with nowhere", "nowhere"),
    ("predict alone", "trained data/images --out new --set evaluation.decoder=dice", "decoder"),
    ("report alone", "", "EXPERIMENT_DIR"), ("report alone", "nowhere", "nowhere"), ("report alone", "data", "data"),
    ("report alone", "study.json", "study.json"), ("report alone", "runs/study nowhere", "nowhere"),
    ("suggest alone", "", "--count"), ("suggest alone", "--count 0", "--count"),
    ("suggest alone", "--count 1000", "1000"), ("suggest alone", "--count 1 --out study.json", "study.json"),
    ("suggest alone", "--count 1 --set finetune.checkpoint=nowhere.safetensors", "nowhere"),
    ("pack alone", "--pack new.zip", ".npz"), ("pack alone", "", "--pack"),
    ("pack alone", "--pack study.json/new.npz", "study.json"),
    ("convert", "", "IN"), ("convert", "nowhere.csv new.csv", "nowhere.csv"),
    ("convert", "labels/coco.json study.json", "study.json"), ("convert", "labels/coco.json new.doc", "new.doc"),
    ("convert", "labels/coco.json new.csv --from cvat", "coco.json"),
    ("convert", "labels/cvat.xml new.csv --from coco", "cvat.xml"),
    ("convert", "labels/cvat.xml new.csv --from tps --names a b c", "cvat.xml"),
    ("convert", "labels/landmarks.tps new.csv", "--images"),
    ("convert", "labels/landmarks.tps new.csv --names a b", "landmarks.tps"),
    ("convert", "labels/coco.json new.csv --names a b z", "z"),
    ("convert", "labels/coco.json new.csv --images nowhere", "nowhere"),
    ("convert", "labels/coco.json new.csv --images volumes/images", "p00"),
    ("convert", "study.json new.csv", "study.json"),
    ("convert", "data/images/p00.png new.csv", "p00.png"), ("convert", "labels/landmarks.csv new.xml", "--images"),
    ("convert", "labels/coco.json study.json/x.csv", "study.json"),
    ("check", "--dance", "--dance"), ("check", "--set dataset.root=nowhere", "nowhere"),
    ("check", "--out study.json", "study.json"), ("check volumes", "--set is_3d=false", "is_3d"),
    ("compare alone", "", "A.csv"), ("compare alone", "nowhere.csv found/predictions.csv", "nowhere.csv"),
    ("compare alone", "found/predictions.csv study.json", "study.json"),
    ("compare alone", "found/predictions.csv data", "data"),
    ("compare alone", "found/predictions.csv labels/landmarks.csv --truth nowhere.csv", "nowhere.csv"),
    ("compare alone", "found/predictions.csv trained/predictions.csv --spacing 0", "spacing"),
    ("compare alone", "found/predictions.csv trained/predictions.csv --spacing nan", "spacing"),
    ("compare alone", "found/predictions.csv trained/predictions.csv --thresholds -1", "thresholds"),
    ("compare alone", "found/predictions.csv trained/predictions.csv --config nowhere.json", "nowhere.json"),
    ("compare alone", "found/predictions.csv trained/predictions.csv --out study.json/x.csv", "study.json"),
    ("detector alone", "nowhere data/images/p06.png", "nowhere"), ("detector alone", "trained nowhere.png", "nowhere"),
    ("detector alone", "trained study.json", "study.json"), ("detector alone", "trained labels", "labels"),
    ("detector alone", "trained volumes/images/c0.nii.gz", "c0.nii.gz"), ("detector alone", "data data", "data"),
    ("export alone", "", "run_dir"), ("export alone", "nowhere --out new.onnx", "nowhere"),
    ("export alone", "trained --out new.doc", ".onnx"), ("export alone", "data --out new.onnx", "data"),
    ("export alone", "trained --out new.onnx --set finetune.decoder=dice", "decoder"),
    ("export alone", "trained --out study.json/new.onnx", "study.json"),
    ("weights", "nowhere.pt", "nowhere.pt"), ("weights", "study.json", "study.json"), ("weights", "data", "data"),
    ("weights", "pack.npz", "pack.npz"), ("weights", "study.json --dtype int8", "--dtype"),
    ("weights", "runs/study/ddpm/last.pt", "last.pt"),
    ("review alone", "", "RUN"), ("review alone", "trained", "--images"),
    ("review alone", "nowhere --images data", "nowhere"), ("review alone", "trained --images nowhere", "nowhere"),
    ("review alone", "trained --images volumes --port 0", "volumes"),
    ("review alone", "trained --images labels --port 0", "labels"),
    ("review alone", "trained --images data --port x", "--port"),
    ("review alone", "trained --images data --port 99999999", "port"),
    ("review alone", "trained --images data --port -1", "port"),
    ("review alone", "trained --images data --labels study.json", "study.json"),
    ("review alone", "trained --images data --predictions nowhere.csv", "nowhere.csv"),
    ("review alone", "trained --images data --predictions study.json", "study.json"),
    ("review alone", "trained --images data --predictions data", "data"))


def _typed() -> Iterator[tuple[str, list[str], str]]:
    for key, value in SETTINGS:
        names = "nowhere" if "nowhere" in value else "study.json" if "study" in value else key.rpartition(".")[2]
        yield "plan", ["--set", f"{key}={value}"], "data" if key.endswith("description") else names
    for command, line, name in LINES:
        yield command, line.split(), name


TYPED = tuple(_typed())
