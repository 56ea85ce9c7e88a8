from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "DIRECTORY"  # where this file lies, or a name on the hub
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory)

begun = tokenizer("A bean is", return_tensors="pt")
print(tokenizer.decode(model.generate(**begun)[0], skip_special_tokens=True))
