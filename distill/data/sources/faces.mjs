// Draws faces with chosen attributes: SVGs of @dicebear/avataaars as PNGs, and a table as CelebA's.
// node faces.mjs CORE AVATAAARS RESVG OUTPUT COUNT SIDE SEED   (the first three: folders of packages)
import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const [core, avataaars, resvg, output, count, side, seed] = process.argv.slice(2);
const load = (folder, file) => import(pathToFileURL(`${folder}/${file}`).href);
const { createAvatar } = await load(core, 'lib/index.js');
const style = await load(avataaars, 'lib/index.js');
const { initWasm, Resvg } = await load(resvg, 'index.mjs');
await initWasm(readFileSync(`${resvg}/index_bg.wasm`));

const HAIR = { Black_Hair: '2c1b18', Brown_Hair: '724133', Blond_Hair: 'd6b370', Red_Hair: 'c93305', Gray_Hair: 'e8e1e1' };
const TOPS = {
  short: ['shortCurly', 'shortFlat', 'shortRound', 'shortWaved', 'sides', 'theCaesar', 'frizzle', 'shaggy'],
  long: ['bob', 'bun', 'curly', 'curvy', 'longButNotTooLong', 'miaWallace', 'straight01', 'straight02'],
  hat: ['hat', 'winterHat1', 'winterHat02', 'winterHat03', 'turban', 'hijab'],
};
const SKIN = ['614335', 'd08b5b', 'ae5d29', 'edb98a', 'ffdbb4', 'f8d25c'];
const CLOTHES = ['262e33', '65c9ff', '5199e4', '25557c', 'e6e6e6', 'a7ffc4', 'ffafb9', 'ffffb1', 'ff488e', 'ff5c5c'];
const CLOTHING = ['blazerAndShirt', 'collarAndSweater', 'hoodie', 'overall', 'shirtCrewNeck', 'shirtVNeck'];
const NAMES = ['Bald', ...Object.keys(HAIR), 'Long_Hair', 'Wearing_Hat', 'Beard', 'Mustache', 'Eyeglasses', 'Sunglasses', 'Smiling'];

// mulberry32: a face depends on the seed and its number alone
function generator(state) {
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function face(index) {
  const random = generator(Number(seed) * 1000003 + index);
  const choose = (values) => values[Math.floor(random() * values.length)];
  const colour = choose(Object.keys(HAIR));
  const kind = choose(['bald', 'short', 'short', 'short', 'long', 'long', 'long', 'hat', 'hat']);
  const beard = kind !== 'long' && random() < 0.35;
  const mustache = kind !== 'long' && !beard && random() < 0.3;
  const glasses = choose(['', '', 'Eyeglasses', 'Sunglasses']);
  const smiling = random() < 0.5;
  const attributes = {
    Bald: kind === 'bald', Long_Hair: kind === 'long', Wearing_Hat: kind === 'hat', Beard: beard, Mustache: mustache,
    Eyeglasses: glasses === 'Eyeglasses', Sunglasses: glasses === 'Sunglasses', Smiling: smiling,
  };
  for (const name of Object.keys(HAIR)) attributes[name] = name === colour && (kind === 'short' || kind === 'long');
  const options = {
    seed: `${seed}-${index}`, backgroundColor: ['ffffff'],
    top: [kind === 'bald' ? 'sides' : choose(TOPS[kind])], topProbability: kind === 'bald' ? 0 : 100,
    hairColor: [HAIR[colour]], hatColor: [choose(CLOTHES)], facialHairColor: [HAIR[colour]],
    facialHair: [beard ? choose(['beardMajestic', 'beardMedium']) : 'moustacheFancy'],
    facialHairProbability: beard || mustache ? 100 : 0,
    accessories: [glasses === 'Sunglasses' ? choose(['sunglasses', 'wayfarers']) : choose(['prescription01', 'prescription02', 'round'])],
    accessoriesColor: ['262e33'], accessoriesProbability: glasses ? 100 : 0,
    mouth: [smiling ? choose(['smile', 'twinkle']) : choose(['serious', 'sad', 'concerned'])],
    eyes: ['default'], eyebrows: [choose(['default', 'defaultNatural', 'flatNatural'])],
    skinColor: [choose(SKIN)], clothing: [choose(CLOTHING)], clothesColor: [choose(CLOTHES)],
  };
  return { attributes, svg: createAvatar(style, options).toString() };
}

mkdirSync(`${output}/images`, { recursive: true });
const lines = [['image_id', ...NAMES].join(',')];
for (let index = 0; index < Number(count); index++) {
  const { attributes, svg } = face(index);
  const file = `${String(index).padStart(6, '0')}.png`;
  const image = new Resvg(svg, { fitTo: { mode: 'width', value: Number(side) } }).render();
  writeFileSync(`${output}/images/${file}`, image.asPng());
  image.free();
  lines.push([file, ...NAMES.map((name) => (attributes[name] ? 1 : -1))].join(','));
}
writeFileSync(`${output}/table.csv.tmp`, `${lines.join('\n')}\n`);
renameSync(`${output}/table.csv.tmp`, `${output}/table.csv`); // the table stands for all of the images
