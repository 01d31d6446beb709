/** How an image comes to the page: chosen, dropped or pasted. */

import { $ } from "./page.js";

/** @param {(file: File) => void} open */
export function setUpOpening(open) {
  const openFirst = (files) => {
    if (files.length) open(files[0]);
  };
  for (const id of ["open", "choose", "another"]) $(id).onclick = () => $("file").click();
  $("file").addEventListener("change", () => {
    openFirst($("file").files);
    $("file").value = ""; // so that the same file can be chosen again
  });

  let dragDepth = 0; // dragenter and dragleave also come from what is inside
  const dragging = (depth) => {
    dragDepth = depth;
    document.body.classList.toggle("dragging", depth > 0);
  };
  addEventListener("dragenter", (event) => {
    if (event.dataTransfer?.types.includes("Files")) dragging(dragDepth + 1);
  });
  addEventListener("dragleave", () => dragging(Math.max(0, dragDepth - 1)));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(0);
    openFirst(event.dataTransfer?.files ?? []);
  });
  addEventListener("paste", (event) => openFirst(event.clipboardData?.files ?? []));
}
